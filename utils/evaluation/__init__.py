"""What evaluate.py does: samples of the fine-tuned pipeline and its baseline, their scores, and a page to look at."""
