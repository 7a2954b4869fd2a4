"""A Stable Diffusion pipeline: its folder, its modules, its pictures."""
