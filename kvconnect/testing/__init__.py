"""What authors of pipes and buffers test theirs with: laws, peers, leak checks.

Nothing in kvconnect imports this package. Only `kvconnect.testing.pipe_tests`
and its like need pytest.
"""
