"""What is known of accelerators, engines, quantization and model architectures: data, and its lookups."""
