"""What is tested, by what it does; tests share helpers by importing ``tests.…``."""
