"""`modbay demo`: one voice assistant in many languages on a frozen MiniLM, and two languages that arrive later."""
