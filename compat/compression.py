"""For scripts that ran inside Mustafar's folder kernel/ and imported `compression`."""

from kernel.compression import convert_key_batched, convert_value_batched

__all__ = ["convert_key_batched", "convert_value_batched"]
