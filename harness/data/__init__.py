"""Rows from anywhere -> tokenised, memory-mapped stores -> the batches of a step."""
