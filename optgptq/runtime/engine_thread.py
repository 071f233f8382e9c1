"""The thread that runs the steps of an engine; it sleeps while there is nothing to do.

It is sent orders through a queue, from any thread, and answers into the event loop of whoever asked, so several loops
can share an engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from optgptq.errors import UsageError
from optgptq.runtime.engine import Engine
from optgptq.runtime.listener import Listener, Submission
from optgptq.runtime.request_options import check_request_id
from optgptq.runtime.results import Piece


class EngineThread:
    """From its start to its end nobody else may use the engine. Public methods are for other threads."""

    def __init__(self, engine: Engine) -> None:
        """Start it."""
        self._engine = engine
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._is_closing = False
        # Why no more orders are taken. No order comes into the queue after it was emptied for the last time.
        self._end: Exception | None = None
        self._lock = threading.Lock()
        # A program that forgets to close it can end all the same.
        self._thread = threading.Thread(target=self._work, name="optgptq-engine", daemon=True)
        self._thread.start()

    def submit(self, submission: Submission) -> None:
        """Send a request; its listener hears what comes of it.

        Raises:
            Exception: why the thread has ended.
        """
        if not self._put(partial(self._submit, submission)):
            assert self._end is not None
            raise self._end

    def withdraw(self, submission: Submission) -> None:
        """Cancel a request that nobody listens to any more."""
        self._put(partial(self._withdraw, submission))

    def cancel(self, request_id: str) -> None:
        """Cancel a request by its name.

        Raises:
            UsageError: no name.
        """
        check_request_id(request_id)
        self._put(partial(self._cancel, request_id))

    def close(self) -> None:
        """Cancel everything and end; `join` waits for it."""
        self._put(self._note_close)

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def _put(self, order: Callable[[], None]) -> bool:
        """Let the thread do something; return False if it takes no more orders."""
        with self._lock:
            if self._end is None:
                self._orders.put(order)
            return self._end is None

    def _work(self) -> None:
        end: Exception = _error("one that was closed", "Send requests before close(), or make another engine.")
        try:
            while not self._is_closing:
                self._obey()
                self._step()
            for name in tuple(self._listeners):
                self._cancel(name)
        except Exception as error:  # noqa: BLE001 - whoever waits for the thread must hear of any error
            end = error
        except BaseException as error:  # noqa: BLE001 - the same, and a thread has nobody else to tell
            # Raised in the loop of whoever waits, `SystemExit` itself would end that loop without a word.
            found = f"one that {type(error).__name__} has ended"
            end = _error(found, "Leave sys.exit() out of logits processors, and make another engine.")
            end.__cause__ = error
        self._finish(end)

    def _obey(self) -> None:
        """Do what was ordered; wait for an order where there is nothing else to do."""
        waits = not self._engine.has_work
        while waits or not self._orders.empty():
            self._orders.get()()
            waits = False

    def _step(self) -> None:
        if self._engine.has_work:
            self._tell(self._engine.step())
        self._tell_results()

    def _tell(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            listener = self._listeners.get(piece.request_id)
            if listener is not None and not listener.put(piece):
                self._engine.cancel(piece.request_id)

    def _tell_results(self) -> None:
        for name, result in self._engine.take_results():
            listener = self._listeners.pop(name, None)
            if listener is not None:
                listener.put(result)

    def _submit(self, submission: Submission) -> None:
        if self._end is not None:
            submission.listener.put(self._end)
            return
        try:
            submission.name = self._engine.submit(
                submission.prompt,
                submission.params,
                request_id=submission.request_id,
                priority=submission.priority,
                timeout_seconds=submission.timeout_seconds,
                salt=submission.salt,
                stream=submission.stream,
            )
        except Exception as error:  # noqa: BLE001 - a prompt's own code may raise anything; others go on
            submission.listener.put(error)
            return
        self._listeners[submission.name] = submission.listener

    def _withdraw(self, submission: Submission) -> None:
        # The name of a request that has ended may belong to another one by now.
        if submission.name is not None and self._listeners.get(submission.name) is submission.listener:
            self._cancel(submission.name)

    def _cancel(self, name: str) -> None:
        if self._end is None:
            self._tell(self._engine.cancel(name))
            # At once: the next order may be a new request of this name.
            self._tell_results()

    def _note_close(self) -> None:
        self._is_closing = True

    def _finish(self, end: Exception) -> None:
        """Take no more orders, and tell those who wait why."""
        with self._lock:
            self._end = end
        for listener in self._listeners.values():
            listener.put(end)
        while not self._orders.empty():
            self._orders.get()()


def _error(found: str, action: str) -> UsageError:
    return UsageError("asynchronous engine", expected="an open one", found=found, action=action)
