"""Registered ops, their autograd Functions, and the choice of a backend (:mod:`grcsf_fast.ops.backends`)."""
