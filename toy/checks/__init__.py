"""Is it right? The gradient checker, and the self-test of a device."""
