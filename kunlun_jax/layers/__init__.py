"""The blocks that the models are made of, one file each."""
