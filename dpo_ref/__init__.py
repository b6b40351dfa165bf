"""Preference optimisation of language models, with the reference policy as the thing under study."""
