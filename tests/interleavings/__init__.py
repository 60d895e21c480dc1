"""The whole system in its pure cores, under faults: a text ends as it would undisturbed, or with one named error.

``order.py`` decides what happens next, ``failing_ring.py`` is a ring whose links and boards fail, ``cluster.py`` are
the boards and the service that writes texts over them, ``cases.py`` says what befalls them and judges the end.
"""
