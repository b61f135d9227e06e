# the ops (__all__) have the types of toy/ops/reference.py: toy/ops/accelerated.py says so

FORM: str

class CrossEntropyCache: ...
