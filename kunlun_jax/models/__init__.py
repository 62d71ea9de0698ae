"""The models. Each reads top to bottom in one file and maps an EmbeddedBatch to logits [B, tasks]."""
