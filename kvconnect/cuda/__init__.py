"""CUDA for the device pipes: block copies, the threads and streams they run on, memory of other processes.

Nothing here knows pipes, buffers or vLLM. CuPy is imported by `kvconnect.cuda.driver` alone and
only when a device is really used; `kvconnect.cuda.tiles` is plain geometry and runs anywhere.
"""
