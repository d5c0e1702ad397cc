"""What the Triton paths of several ops share."""
