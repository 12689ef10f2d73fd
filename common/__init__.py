"""What every party agrees on. Imports neither client nor server, opens no patient file, knows no network."""
