"""Asks the Hugging Face hub once, with a deadline, whether something is there.

The hub's own client tries for minutes when a machine has no network; a command line has to say so within seconds.
Downloading is left to transformers and datasets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

ANSWER_SECONDS = 6.0
"""How long the hub gets to answer. A name server that drops packets blocks longer than any socket timeout."""


class HubUnreachable(ConnectionError):
    """The hub did not answer; the message says how that showed."""


class HubEntryMissing(LookupError):
    """The hub answered that there is no such entry, or that it may not be read."""


def require_on_hub(kind: Literal["model", "dataset"], name: str) -> None:
    """Asks the hub for an entry, once.

    Args:
        kind: what to look for.
        name: its name there, as in "HuggingFaceTB/SmolLM2-135M".

    Raises:
        HubUnreachable: no answer within ANSWER_SECONDS, or HF_HUB_OFFLINE is set.
        HubEntryMissing: the hub answered, and there is no such entry or it needs a login.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        _call_with_deadline(lambda: ask(name, timeout=ANSWER_SECONDS))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubEntryMissing(f"{api.endpoint} has no {kind} {name!r} that can be read from here") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and status < 500:
            raise HubEntryMissing(f"{api.endpoint} refuses {kind} {name!r} with status {status}") from error
        raise HubUnreachable(f"{api.endpoint} answers with status {status}") from error
    except Exception as error:
        # Which exception a failed connection is depends on the HTTP library this hub client was built on.
        raise HubUnreachable(f"{api.endpoint} cannot be reached ({str(error) or type(error).__name__})") from error


def _call_with_deadline(call: Callable[[], Any]) -> Any:
    """Runs call in a thread that is abandoned after the deadline, whatever it is blocked in."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = call()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 2.0)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {ANSWER_SECONDS + 2.0:.0f} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
