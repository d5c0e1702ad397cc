"""From text to batches: codecs, readers, corpora, windows, packing."""
