"""The engines that the benchmarks compare: one small adapter each, see peer.py."""
