"""The WebUIs: one adapter each behind the protocol of protocol.py. `modules.*` is imported here, never above."""
