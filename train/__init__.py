"""Fine-tuning: votes in, P2L checkpoint out. Needs the extra ``train``."""
