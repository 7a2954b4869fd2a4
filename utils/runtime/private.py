"""Names of the libraries that they do not promise to keep: all that utils/ uses, and the version each was seen in.

Who raises a library's version looks here first; tests/test_architecture.py refuses such names elsewhere. A table of
text, so that every module may import it.
"""

# torch 2.13. DistributedDataParallel's function that names the parameters that it is to leave alone.
DDP_IGNORES = "_set_params_and_buffers_to_ignore_for_model"
# torch 2.13. Many copies in one kernel.
FOREACH_COPY = "_foreach_copy_"
# torch 2.13. A module's hooks, as dictionaries.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# CUDA 13.0, by torch.cuda.cudart(). The host's memory that a GPU may read, and no longer.
HOST_REGISTER, HOST_UNREGISTER = "cudaHostRegister", "cudaHostUnregister"

# diffusers 0.42. Classes by name: one that is renamed or moved costs speed, but ends no run.
RESNET, TRANSFORMER, BLOCK = "ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock"
ATTENTION, PROCESSOR, FEED_FORWARD, GATE = "Attention", "AttnProcessor2_0", "FeedForward", "GEGLU"
FIRST_BLOCK = "CrossAttnDownBlock2D"
UNET_BLOCKS = (FIRST_BLOCK, "DownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D")

# Triton 3.6 to 3.9. Its compilation in threads, whose `submit`, and a kernel's `run`, are used there too.
ASYNC_COMPILE, ASYNC_MODE, ACTIVE_MODE = "triton.runtime._async_compile", "AsyncCompileMode", "active_mode"
# Triton 3.9. A hash of all its own files, which it keeps.
TRITON_CACHE, TRITON_KEY = "triton.runtime.cache", "triton_key"

# ColossalAI 0.5.0. What it imports of packages that nothing here needs, whatever part of it is used.
IMPORTED_BY_COLOSSALAI = (
    *("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "galore_torch"),
    *("peft", "peft.utils", "peft.utils.other", "peft.utils.save_and_load"),
)
