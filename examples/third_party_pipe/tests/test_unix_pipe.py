from unix_pipe import UnixPipe

from kvconnect.testing.pipe_tests import PipeTests


class TestUnixPipe(PipeTests):
    pipe_class = UnixPipe
