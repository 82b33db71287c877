"""Where tensors live and how they travel: mesh, tensor parallel, shard units, pipeline."""
