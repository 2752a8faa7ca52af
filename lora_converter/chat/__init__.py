"""Conversations as training data: records become masked token ids, and these become rows. No model, no torch."""
