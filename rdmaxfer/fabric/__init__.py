"""What moves the bytes. Importing this package loads neither pyverbs nor the native core."""
