"""The students, and what computes their distillation losses. Start with `meta_arch.py`."""
