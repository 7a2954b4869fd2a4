PROGRAM = "train_dreambooth_colossalai"
