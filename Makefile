# Each target makes and fills its own environment (.venv) through install.py.
PYTHON ?= python3

.PHONY: demo test bench lint
demo:
	$(PYTHON) install.py --demo $(ARGS)
test:
	$(PYTHON) install.py --test $(ARGS)
bench:
	$(PYTHON) install.py --bench $(ARGS)
	$(PYTHON) install.py --bench-canvas
lint:
	$(PYTHON) install.py --lint $(ARGS)
