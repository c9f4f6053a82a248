"""The training library: from a frozen Plan to a trained, verified, exported model. No Ray here."""
