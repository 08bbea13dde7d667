"""For scripts that ran inside the folder kernel_quant/ and imported `compression_quant`."""

from kernel_quant.compression_quant import convert_key_batched_quant, convert_value_batched_quant

__all__ = ["convert_key_batched_quant", "convert_value_batched_quant"]
