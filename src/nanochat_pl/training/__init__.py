"""Training: the only package with Lightning in it. One step, one module, one kind of resume file for all stages."""
