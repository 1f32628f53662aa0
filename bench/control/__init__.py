"""What a thousand producers and a thousand consumers cost each other at the control channel."""
