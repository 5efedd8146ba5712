"""
Waiting for an unreachable Milvus: retry with backoff, say so, and give up after retrieval_timeout. Training never goes
on without neighbors in silence.
"""
import time

from configurator import UserError
from retrieval.local_server import Unreachable

LONGEST_PAUSE = 5  # seconds between two attempts


class RetrievalTimeout(UserError):
    """Milvus was unreachable for longer than retrieval_timeout."""
    exit_code = 3


def wait_for_milvus(call, reconnect, timeout, say):
    """
    What call() returns. While it raises Unreachable, reconnect(timeout=seconds) and call() again. RetrievalTimeout
    after `timeout` seconds.
    """
    down_since, pause = None, 0.5
    while True:
        try:
            if down_since:
                reconnect(timeout=max(1.0, timeout - time.monotonic() + down_since))
            answer = call()
            if down_since:
                say(f'Milvus is back after {time.monotonic() - down_since:.0f} s')
            return answer
        except Unreachable as error:
            down_since = down_since or time.monotonic()
            waited = time.monotonic() - down_since
            if waited >= timeout:
                raise RetrievalTimeout(f'waited {waited:.0f} s for Milvus, and retrieval_timeout is {timeout:.0f}: '
                                       f'{error}') from error
            say(f'waiting for Milvus: {waited:.0f} s of at most {timeout:.0f} s ({error})')
            time.sleep(min(pause, timeout - waited))
            pause = min(2 * pause, LONGEST_PAUSE)
