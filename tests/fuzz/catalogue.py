"""x"""
from tests.fuzz import of_bytes, of_control
TARGETS = {t.name: t for m in (of_control, of_bytes) for t in m.TARGETS}
