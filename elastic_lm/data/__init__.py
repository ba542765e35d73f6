"""From raw text to batches of token ids: corpus, order, windows. No torch, no Ray."""
