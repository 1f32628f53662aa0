"""A small proxy in front of prefilling and decoding vLLM servers (``python -m kvconnect proxy``).

It speaks the ticket protocol of vLLM's ``NixlConnector``, as other routers do:
the prefill server computes the prompt and answers with a ticket, which goes
into the request for the decode server. Needs the extra ``kvconnect[proxy]``.
"""
