"""How tokens are sampled: one small interface, several engines."""
