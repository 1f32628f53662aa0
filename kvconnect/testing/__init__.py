"""What authors of pipes, buffers and connectors test theirs with. Nothing in kvconnect imports this package.

==================  =======================================================================
`pipe_tests`        `PipeTests`, `CudaPipeTests`: subclass them (pytest)
`buffer_tests`      `BufferTests`, likewise
`connector_tests`   `ConnectorTests`, likewise (pytest and vLLM; no model, no device)
`pipe_laws`, `block_laws`, `process_laws`, `stream_laws`, `buffer_laws`, `shared_laws`, `connector_laws`
                    what these run: plain functions that raise `AssertionError`
`peers`             both ends of a pipe in one process
`processes`         the other end in a process of its own, to be killed and stopped
`faults`            any pipe that is slow, stuck, cut or damages what it carries
`leaks`             threads, open files and shared memory, before and after
`engine`, `checked_engine`
                    vLLM's scheduler and its workers' steps around a connector (vLLM)
==================  =======================================================================

Laws are skipped for traits that a class does not declare, and for nothing else; what works
and is not declared fails.
"""
