"""``python -m kvconnect demo``: two real vLLM engines on one machine, one prefilling, one decoding."""
