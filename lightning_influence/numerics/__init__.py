"""Tensors in, tensors out: the algorithms that know no model, no data and no Trainer."""
