-- The index has the database that POSTGRES_DB names; Label Studio gets one of its own.
CREATE DATABASE labelstudio;
