"""The mathematics of TreeRPO: no Ray, no vLLM, no I/O and no clock in here."""
