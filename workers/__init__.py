"""The processes of the Procfile: what runs when, on Dramatiq and periodiq. The work is in app."""
