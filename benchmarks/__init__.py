"""CA-Stream beside its peers, one command each."""
