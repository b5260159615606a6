"""report.html: a run as one page that needs nothing else, from the content of results.json.

`page` puts the sections together, each in a module of its own; nothing here knows a model or an estimator.
"""
