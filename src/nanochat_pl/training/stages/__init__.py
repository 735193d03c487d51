"""The stages of training, one file each: what each starts from, trains on and leaves."""
