"""Off-policy replay: what another policy would have earned and cost on logged decisions. See docs/replay.md."""
