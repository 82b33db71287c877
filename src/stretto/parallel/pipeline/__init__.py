"""The pipeline runtime: plays a Schedule's operations on this rank's stages, over channels."""
