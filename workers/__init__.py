"""The processes of the Procfile, on Dramatiq and periodiq: what runs when. The work is in app."""
