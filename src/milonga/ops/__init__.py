"""Mathematics on tensors: no nn.Module, no config, no global."""
